"use strict";
// The slider: shows of every prompt the answers at one weight. Without it the page shows the ends.
for (const knob of document.querySelectorAll(".knob")) {
  const slider = knob.querySelector("input");
  const said = knob.querySelector("output");
  const answers = knob.querySelectorAll("[data-at]");
  const turn = () => {
    for (const answer of answers) {
      answer.classList.toggle("now", answer.dataset.at === slider.value);
    }
    const w = knob.querySelector(".now .w").textContent;
    said.textContent = w;
    slider.setAttribute("aria-valuetext", w);
  };
  slider.addEventListener("input", turn);
  knob.classList.add("live");
  turn();
}
