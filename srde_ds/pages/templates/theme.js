// Before the page is drawn: the theme that the reader chose last.
"use strict";
try {
  const chosen = localStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch (error) { /* a file's page may have no storage */ }
