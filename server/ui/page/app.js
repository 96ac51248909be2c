/** Puts the page together: who we are, which views there are, and what keeps them up to date. */
import { mount as mountChat } from "./chat.js";
import { mount as mountDiagnostics } from "./diagnostics.js";
import { mount as mountDirection } from "./direction.js";
import { keepUp } from "./feed.js";
import { mount as mountFineTunes } from "./fine_tunes.js";
import { mount as mountFrontier } from "./frontier.js";
import { mount as mountHeatmap } from "./heatmap.js";
import { mount as mountJobs } from "./jobs.js";
import { mount as mountMap } from "./map.js";
import { mount as mountModels } from "./models.js";
import { mount as mountOnboard } from "./onboard.js";
import { askForKey, learnSession, mountKey } from "./session.js";
import { mountState } from "./state.js";
import { changed, store } from "./store.js";
import { followStudies } from "./studies.js";
import { mount as mountStudy } from "./study.js";
import { allowViews, mountViews } from "./views.js";

/** @type {Record<string, (section: HTMLElement, store: import("./store.js").Store) => void>} */
const SECTIONS = {
  map: mountMap,
  models: mountModels,
  onboard: mountOnboard,
  jobs: mountJobs,
  heatmap: mountHeatmap,
  frontier: mountFrontier,
  diagnostics: mountDiagnostics,
  study: mountStudy,
  direction: mountDirection,
  fine_tunes: mountFineTunes,
  chat: mountChat,
};

/** Begins as whoever the tab's key makes us; another key begins another page. */
async function begin() {
  const session = await learnSession();
  store.session = session;
  changed("session", "connection");
  allowViews(session.role);
  if (session.role !== "admin" && session.role !== "metrics") {
    store.connection = "off";
    changed("connection");
    return;
  }
  const refusal = await keepUp(new AbortController().signal);
  if (refusal === null) return;
  store.connection = "off";
  changed("connection");
  askForKey(refusal.message);
}

/** @param {string} id */
function section(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

mountViews();
mountState(section("state"));
mountKey();
for (const [id, mount] of Object.entries(SECTIONS)) mount(section(id), store);
followStudies(section("analysis"));
document.addEventListener("themechange", () => changed("theme"));
void begin();
