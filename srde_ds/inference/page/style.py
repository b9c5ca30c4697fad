"""How the page looks, beyond Gradio's own elements, and how the arrow keys move in it."""

# An expert has a colour for light and one for dark pages, whose body Gradio marks. Gradio rewrites selectors, but
# wrongly if .dark follows a comma.
CSS = """
.gradio-container { max-width: 90rem !important; }
.swatch, .token { --expert: var(--light); }
.dark .swatch { --expert: var(--dark); }
.dark .token { --expert: var(--dark); }

.heading h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
.heading p { color: var(--body-text-color-subdued); margin: 0.2rem 0 0; overflow-wrap: anywhere; }
.legend {
  font-size: 0.9rem; display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; list-style: none; margin: 0; padding: 0;
}
.legend li { display: flex; align-items: center; gap: 0.4rem; margin: 0; overflow-wrap: anywhere; }
.swatch { flex: none; width: 1rem; height: 1rem; border-radius: 3px; background: var(--expert); }

/* Laid out from its end, so that it stays at the latest token unless the reader scrolls up. */
#conversation {
  flex-direction: column-reverse; flex-wrap: nowrap; overflow-y: auto; height: max(22rem, calc(100dvh - 23rem));
  padding: 0.9rem;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--background-fill-primary);
}
#conversation > div { margin-bottom: auto; gap: 0; }
#conversation .html-container, .actions .html-container { padding: 0; }
.hint { color: var(--body-text-color-subdued); margin: 0; }
.turn { padding-bottom: 1.4rem; }
.turn h2 {
  font-size: 1rem; font-weight: 600; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0 0 0.6rem; padding: 0.5rem 0.8rem; border-radius: var(--radius-md);
  background: var(--background-fill-secondary);
}
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; }
.answer {
  position: relative; min-width: 0; padding: 0.6rem 0.8rem; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-md);
}
.answer h3 {
  font-size: 0.85rem; font-weight: 600; margin: 0 0 0.4rem; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere;
}
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; min-height: 1.75em; }
.answer[aria-busy] .text::after { content: "▍"; color: var(--body-text-color-subdued); }
.mean { margin: 0.5rem 0 0; font-size: 0.85rem; color: var(--body-text-color-subdued); }
.note {
  margin: 0.7rem 0 0; padding: 0.5rem 0.8rem; border-left: 3px solid #c0392b;
  background: var(--background-fill-secondary); overflow-wrap: anywhere;
}

/* Without an expert's colours this is no valid colour, so a token that was not read has none. */
.token {
  background: color-mix(in srgb, var(--expert) calc(14% + var(--share) * 0.36), transparent); cursor: default;
}
.token:hover, .token:focus { outline: 2px solid var(--expert, currentcolor); }
/* No top is given, so it hangs below the token's line; left and right are the box's. */
.token:hover::after, .token:focus::after {
  content: attr(data-weights); position: absolute; left: 0.8rem; max-width: calc(100% - 1.6rem); margin-top: 1.9em;
  z-index: 5; padding: 0.25rem 0.6rem; border-radius: 4px; white-space: normal; pointer-events: none;
  font-size: 0.85rem; line-height: 1.5; color: var(--background-fill-primary); background: var(--body-text-color);
}
.prompt { position: relative; margin: -0.6rem 0 1.4rem; }
.prompt summary { cursor: pointer; font-size: 0.85rem; color: var(--body-text-color-subdued); }
.prompt .text { margin-top: 0.4rem; }

.actions { align-items: stretch; }
.actions .block, .actions .html-container, .actions .prose { height: 100%; }
.download {
  display: flex; align-items: center; justify-content: center; height: 100%; padding: 0.5rem 1rem;
  font-size: var(--button-large-text-size); font-weight: var(--button-large-text-weight);
  border-radius: var(--button-large-radius); color: var(--button-secondary-text-color) !important;
  background: var(--button-secondary-background-fill); text-decoration: none !important;
}
.download:hover { background: var(--button-secondary-background-fill-hover); }
"""

ARROW_KEYS = """
element.addEventListener('keydown', event => {
  const sides = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'};
  const token = event.target.closest('.token'), next = token && token[sides[event.key]];
  if (next) { next.focus(); event.preventDefault(); }
});
"""
