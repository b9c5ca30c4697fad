// Items to browse: unpacked when they come near, filtered, and shown a page at a time. All text goes in as text.
"use strict";
(() => {
  const PAGE = 10;
  const SHADES = JSON.parse(document.getElementById("colors").textContent).light.series.length - 1;

  async function unpacked(holder) {
    const bytes = Uint8Array.from(atob(holder.querySelector(".packed").textContent), (each) => each.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const items = JSON.parse(await new Response(stream).text());
    for (const [, , , , answers] of items)
      for (const answer of answers)
        if (answer[0] === 0) answer[0] = answer[2].join("");
    return items;
  }

  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const verdict = (correct) => (correct === null ? "none" : correct ? "right" : "wrong");
  const SAID = { right: "✓ right", wrong: "✗ wrong", none: "not scored" };

  function percentages(shares, names) {
    const order = shares.map((share, expert) => [share, expert]).filter(([share]) => share > 0);
    order.sort((one, other) => other[0] - one[0]);
    return order.map(([share, expert]) => `${names.experts[expert]} ${Math.round(share)}\u00a0%`).join(", ");
  }

  // The answer with each token on the colour of its first expert, the stronger the larger its share.
  function colored(tokens, shares, names) {
    const text = element("div", "said");
    tokens.forEach((token, place) => {
      const own = shares[place];
      if (!own) return text.append(token);
      const first = own.indexOf(Math.max(...own));
      const span = element("span", "token", token);
      span.style.setProperty("--expert", `var(--series-${first % SHADES})`);
      span.style.setProperty("--share", `${Math.round(25 + own[first] * 0.25)}%`);
      span.title = percentages(own, names);
      text.append(span);
    });
    return text;
  }

  function answer(title, content, correct, note) {
    const box = element("div", "answer");
    const head = element("h3", "", title);
    if (correct !== undefined) head.append(" ", element("span", `verdict ${verdict(correct)}`, SAID[verdict(correct)]));
    box.append(head, content);
    if (note) {
      const line = element("p", "mean", note);
      line.setAttribute("aria-live", "polite");
      content.addEventListener("click", ({ target }) => { if (target.title) line.textContent = `“${target.textContent}”: ${target.title}`; });
      box.append(line);
    }
    return box;
  }

  function plain(text) {
    return text === null ? element("div", "said empty", "no answer was asked for")
      : text === "" ? element("div", "said empty", "(nothing)") : element("div", "said", text);
  }

  function card([domain, source, messages, expected, answers], names) {
    const made = element("li", "item");
    const head = element("p", "origin");
    head.append(element("strong", "", names.domains[domain]));
    if (source) head.append(` · ${source}`);
    made.append(head);
    for (const [role, text] of messages) {
      const message = element("div", "message");
      if (messages.length > 1 || role !== "user") message.append(element("h3", "", role));
      message.append(element("div", "said", text));
      made.append(message);
    }
    const row = element("div", "answers");
    if (expected !== null) row.append(answer("expected", plain(expected)));
    answers.forEach(([text, correct, tokens, shares], model) => {
      if (!tokens) return row.append(answer(names.models[model], plain(text), correct));
      const mean = names.experts.map((_, e) => shares.reduce((sum, own) => sum + own[e], 0) / (shares.length || 1));
      row.append(answer(names.models[model], colored(tokens, shares, names), correct, percentages(mean, names)));
    });
    if (row.children.length) made.append(row);
    return made;
  }

  function matches(item, state, words) {
    if (state.domain !== "" && item[0] !== Number(state.domain)) return false;
    if (state.models.some((wanted, model) => wanted && verdict(item[4][model][1]) !== wanted)) return false;
    if (!words) return true;
    const texts = [item[1], item[3], ...item[2].map(([, text]) => text), ...item[4].map(([text]) => text)];
    return texts.some((text) => text && text.toLowerCase().includes(words));
  }

  function browse(holder, items) {
    const names = JSON.parse(holder.querySelector(".names").textContent);
    const state = { domain: "", models: names.models.map(() => ""), page: 0 };
    const search = holder.querySelector("input[type=search]");
    const list = holder.querySelector(".list");
    let found = items;

    function show() {
      const pages = Math.max(1, Math.ceil(found.length / PAGE));
      state.page = Math.min(Math.max(0, state.page), pages - 1);
      const first = state.page * PAGE;
      list.replaceChildren(...found.slice(first, first + PAGE).map((item) => card(item, names)));
      list.start = first + 1;
      if (!found.length) list.append(element("li", "item empty", "No item fits."));
      holder.querySelector(".found").textContent =
        found.length === items.length ? `${items.length} items` : `${found.length} of ${items.length} items`;
      for (const place of holder.querySelectorAll(".place")) place.textContent = `page ${state.page + 1} of ${pages}`;
      for (const button of holder.querySelectorAll(".previous")) button.disabled = state.page === 0;
      for (const button of holder.querySelectorAll(".next")) button.disabled = state.page === pages - 1;
    }

    function filter() {
      const words = search.value.trim().toLowerCase();
      found = items.filter((item) => matches(item, state, words));
      state.page = 0;
      show();
    }

    for (const chip of holder.querySelectorAll(".chip"))
      chip.addEventListener("click", () => {
        state.domain = chip.dataset.domain;
        for (const other of holder.querySelectorAll(".chip")) other.setAttribute("aria-pressed", String(other === chip));
        filter();
      });
    for (const select of holder.querySelectorAll("select[data-model]"))
      select.addEventListener("change", () => { state.models[Number(select.dataset.model)] = select.value; filter(); });
    search.addEventListener("input", filter);
    for (const [name, by] of [[".previous", -1], [".next", 1]])
      for (const button of holder.querySelectorAll(name))
        button.addEventListener("click", () => {
          state.page += by;
          show();
          if (button.closest(".below")) holder.scrollIntoView();
        });
    show();
    holder.dataset.ready = "true";
  }

  for (const swatch of document.querySelectorAll(".swatch"))
    swatch.style.setProperty("--expert", `var(--series-${swatch.dataset.expert % SHADES})`);
  for (const holder of document.querySelectorAll(".items"))
    unpacked(holder).then((items) => browse(holder, items));
})();
