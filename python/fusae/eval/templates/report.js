(() => {
  "use strict";
  const form = document.getElementById("search");
  if (!form) return;
  const box = document.getElementById("q"), only = document.getElementById("only");
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
  const remember = () => {
    const hash = box.value ? "#q=" + encodeURIComponent(box.value) : "#latents";
    try { history.replaceState(null, "", hash); } catch { /* some browsers forbid it for file:// */ }
  };
  const fromHash = () => {
    if (!location.hash.startsWith("#q=")) return;
    try { box.value = decodeURIComponent(location.hash.slice(3)); } catch { box.value = location.hash.slice(3); }
    apply();
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", () => { apply(); remember(); });
  only.addEventListener("change", apply);
  window.addEventListener("hashchange", fromHash);
  apply();
  fromHash();
})();
