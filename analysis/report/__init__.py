"""A family's study as one HTML file: tables and figures that need nothing from outside."""
