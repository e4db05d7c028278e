"use strict";
// Pictures are decoded when they come near the window: a data: address in `src` would be decoded at once.
const show = (picture) => {
  near.unobserve(picture);
  picture.src = picture.dataset.src;
  delete picture.dataset.src;
};
const near = new IntersectionObserver((seen) => {
  for (const one of seen) if (one.isIntersecting) show(one.target);
}, { rootMargin: "600px" });
const waiting = () => document.querySelectorAll("img[data-src]");
for (const picture of waiting()) near.observe(picture);
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll(".category")) one.open = true;
  for (const picture of waiting()) show(picture);
});

const list = document.getElementById("list");
if (list) {
  const categories = [...list.children];
  const [search, sort, age, told] = ["search", "sort", "age", "told"].map((id) => document.getElementById(id));
  const texts = new Map(categories.map((one) => [one, one.dataset.text.normalize("NFKC")]));
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
    const wanted = search.value.trim().toLowerCase().normalize("NFKC");
    for (const one of categories) {
      const fits = (age.value === "all" || one.dataset.age === age.value) && texts.get(one).includes(wanted);
      one.hidden = !fits;
    }
    tell();
  };
  const tell = () => {
    told.textContent = `${categories.filter((one) => !one.hidden).length} of ${categories.length} categories`;
  };
  sort.addEventListener("change", arrange);
  age.addEventListener("change", filter);
  search.addEventListener("input", filter);
  const set = (open, which) => { for (const one of categories) if (which(one)) one.open = open; };
  document.getElementById("fine").addEventListener("click", () => set(false, (one) => one.dataset.fine === "1"));
  document.getElementById("close").addEventListener("click", () => set(false, () => true));
  document.getElementById("open").addEventListener("click", () => set(true, () => true));
  // nothing that has the focus, or was jumped to, lies under the bar
  const bar = document.querySelector(".tools");
  new ResizeObserver(() => {
    const height = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
    document.documentElement.style.scrollPaddingTop = `${height + 8}px`;
  }).observe(bar);
  const go = (one, block) => {
    one.querySelector("summary").focus({ preventScroll: true });
    one.querySelector("summary").scrollIntoView({ block });
  };
  const step = (by) => {
    const visible = [...list.children].filter((one) => !one.hidden);
    const here = visible.findIndex((one) => one.contains(document.activeElement));
    const next = visible[Math.min(visible.length - 1, Math.max(0, here + by))];
    if (next) go(next, "nearest");
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
    if (!one) return;
    event.preventDefault();  // the jump of the link would take the focus away
    history.replaceState(null, "", link.getAttribute("href"));
    one.hidden = false; one.open = true;
    tell();
    go(one, "start");
  });
  // a browser that comes back to a page may keep what was chosen
  addEventListener("pageshow", () => { arrange(); filter(); });
}
