"use strict";
// Fronts of many methods: shows and hides them, and says what is pointed at.
for (const fronts of document.querySelectorAll(".fronts")) {
  const said = fronts.querySelector("output");
  const hint = said.textContent;
  const boxes = [...fronts.querySelectorAll("input")];
  const methods = [...fronts.querySelectorAll("g[data-method]")];
  const choose = () => {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const method of methods) {
      method.classList.toggle("off", !shown.has(method.dataset.method));
    }
  };
  const point = (event) => {
    const near = event.target.closest("[data-method]");
    const name = event.target.querySelector?.(":scope > title") ?? null;
    fronts.classList.toggle("over", near !== null);
    for (const method of methods) {
      method.classList.toggle("near", method.dataset.method === near?.dataset.method);
    }
    said.textContent = name?.textContent ?? hint;
  };
  for (const box of boxes) box.addEventListener("change", choose);
  for (const button of fronts.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = button.value === "all";
      choose();
    });
  }
  fronts.addEventListener("pointerover", point);
  fronts.addEventListener("focusin", point);
  fronts.classList.add("live");
  choose();
}
