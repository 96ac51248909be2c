// Sets the theme before anything is painted; hence no module. Tells of changes by the event "themechange".
"use strict";

(() => {
  const CHOICE = "linker-theme"; // of localStorage: "light", "dark", or nothing: as the system
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  /** @returns {"light"|"dark"|null} */
  function chosen() {
    try {
      const value = localStorage.getItem(CHOICE);
      return value === "light" || value === "dark" ? value : null;
    } catch {
      return null; // storage is forbidden: it is then as the system
    }
  }

  function apply() {
    document.documentElement.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
    document.dispatchEvent(new Event("themechange"));
  }

  document.addEventListener("themechoice", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    const isSystems = other === (system.matches ? "dark" : "light");
    try {
      if (isSystems) localStorage.removeItem(CHOICE);
      else localStorage.setItem(CHOICE, other);
    } catch {
      document.documentElement.dataset.theme = other; // for this page alone
      document.dispatchEvent(new Event("themechange"));
      return;
    }
    apply();
  });
  system.addEventListener("change", apply);
  apply();
})();
