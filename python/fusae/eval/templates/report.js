(() => {
  "use strict";
  const form = document.getElementById("search");
  if (!form) return;
  const box = document.getElementById("q"), only = document.getElementById("only");
  const sort = document.getElementById("sort");
  const said = document.getElementById("said");

  // Each passage as one lower-case string, with the place of every token in it, so that a search may span tokens.
  const read = (el) => {
    let text = "", lit = "";
    const tokens = [...el.querySelectorAll(".t")].map((t) => {
      const part = t.textContent.toLowerCase(), at = text.length;
      text += part;
      lit += t.classList.contains("on") ? part : "\u0000".repeat(part.length);
      return { t, at, end: text.length };
    });
    return { el, text, lit, tokens };
  };
  const latents = [...document.querySelectorAll(".latent")].map((el) => ({
    el,
    index: el.dataset.latent,
    density: Number(el.dataset.density),
    max: Number(el.dataset.max),
    latent: -Number(el.dataset.latent),
    chips: [...el.querySelectorAll(".chip")].map((c) => ({ el: c, text: c.textContent.toLowerCase() })),
    passages: [...el.querySelectorAll(".passage")].map(read),
  }));

  const apply = () => {
    const q = box.value.toLowerCase();
    let shown = 0;
    for (const latent of latents) {
      let found = q === "" || q === "#" + latent.index;
      const byIndex = found;
      for (const chip of latent.chips) {
        const hit = q !== "" && chip.text.includes(q);
        chip.el.classList.toggle("hit", hit);
        if (hit && !only.checked) found = true;
      }
      for (const p of latent.passages) {
        const text = only.checked ? p.lit : p.text, places = [];
        if (q !== "") for (let i = text.indexOf(q); i >= 0; i = text.indexOf(q, i + 1)) places.push(i);
        for (const { t, at, end } of p.tokens)
          t.classList.toggle("hit", places.some((i) => i < end && i + q.length > at));
        p.el.classList.toggle("dim", !byIndex && places.length === 0);
        if (places.length) found = true;
      }
      if (found && !latent.passages.some((p) => !p.el.classList.contains("dim")))
        for (const p of latent.passages) p.el.classList.remove("dim");
      latent.el.hidden = !found;
      shown += found;
    }
    said.textContent = q === "" ? `${latents.length} latents` : `${shown} of ${latents.length} latents`;
  };
  // Largest first, but by number; "as listed" is the order of the file.
  const arrange = () => {
    const by = sort.value, list = [...latents];
    if (by !== "given") list.sort((a, b) => b[by] - a[by]);
    list[0]?.el.parentNode.append(...list.map((latent) => latent.el));
  };
  const remember = () => {
    const parts = [];
    if (box.value) parts.push("q=" + encodeURIComponent(box.value));
    if (sort.value !== "given") parts.push("sort=" + sort.value);
    const hash = parts.length ? "#" + parts.join("&") : "#latents";
    try { history.replaceState(null, "", hash); } catch { /* some browsers forbid it for file:// */ }
  };
  const fromHash = () => {
    const link = /^#latent-(\d+)$/.exec(location.hash);
    if (link) {  // a latent that the search hides is shown again
      const found = latents.find((latent) => latent.index === link[1]);
      if (found?.el.hidden) { box.value = ""; apply(); found.el.scrollIntoView(); }
      return;
    }
    if (!/^#(q|sort)=/.test(location.hash)) return;
    for (const part of location.hash.slice(1).split("&")) {
      const at = part.indexOf("="), name = part.slice(0, at);
      let value = part.slice(at + 1);
      try { value = decodeURIComponent(value); } catch { /* as it is */ }
      if (name === "q") box.value = value;
      if (name === "sort" && [...sort.options].some((option) => option.value === value)) sort.value = value;
    }
    arrange();
    apply();
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", () => { apply(); remember(); });
  only.addEventListener("change", apply);
  sort.addEventListener("change", () => { arrange(); remember(); });
  window.addEventListener("hashchange", fromHash);
  apply();
  fromHash();
})();
