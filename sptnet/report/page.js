"use strict";
// Pictures are decoded when they come near the window: a data: address in `src` would be decoded at once.
const near = new IntersectionObserver((seen) => {
  for (const one of seen) if (one.isIntersecting) {
    near.unobserve(one.target);
    one.target.src = one.target.dataset.src;
    delete one.target.dataset.src;
  }
}, { rootMargin: "600px" });
for (const picture of document.querySelectorAll("img[data-src]")) near.observe(picture);

const list = document.getElementById("list");
if (list) {
  const categories = [...list.children];
  const [search, sort, age, told] = ["search", "sort", "age", "told"].map((id) => document.getElementById(id));
  const orders = {
    size: ["size", -1], sure: ["confidence", -1], unsure: ["confidence", 1], novel: ["novelty", -1],
    near: ["novelty", 1], pure: ["purity", -1], mixed: ["purity", 1],
  };
  // what is not known comes last, whichever way
  const value = (one, key, sign) => one.dataset[key] === "" ? Infinity : sign * Number(one.dataset[key]);
  const arrange = () => {
    const [key, sign] = orders[sort.value];
    const sorted = [...categories].sort((a, b) =>
      value(a, key, sign) - value(b, key, sign) || Number(b.dataset.size) - Number(a.dataset.size));
    list.replaceChildren(...sorted);
  };
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const one of categories) {
      const fits = (age.value === "all" || one.dataset.age === age.value) && one.dataset.text.includes(wanted);
      one.hidden = !fits;
      shown += fits;
    }
    told.textContent = `${shown} of ${categories.length} categories`;
  };
  sort.addEventListener("change", arrange);
  age.addEventListener("change", filter);
  search.addEventListener("input", filter);
  const set = (open, which) => { for (const one of categories) if (which(one)) one.open = open; };
  document.getElementById("fine").addEventListener("click", () => set(false, (one) => one.dataset.fine === "1"));
  document.getElementById("close").addEventListener("click", () => set(false, () => true));
  document.getElementById("open").addEventListener("click", () => set(true, () => true));
  const step = (by) => {
    const visible = [...list.children].filter((one) => !one.hidden);
    const here = visible.findIndex((one) => one.contains(document.activeElement));
    const next = visible[Math.min(visible.length - 1, Math.max(0, here + by))];
    if (next) next.querySelector("summary").focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === search) { search.value = ""; filter(); search.blur(); }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#c']");
    const one = link && /^#c\d+$/.test(link.getAttribute("href")) && document.getElementById(link.getAttribute("href").slice(1));
    if (one) { one.hidden = false; one.open = true; one.querySelector("summary").focus(); }
  });
  filter();
}
