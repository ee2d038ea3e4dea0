// The weight matrix of a parameter as a heat map, where whole partials were kept.

import { empty, fill, h } from "./dom.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */

export class Matrix {
  constructor() {
    this.element = h("div", {});
  }

  /** @param {State} state @param {Info} info @param {string} stage */
  async show(state, info, stage) {
    fill(this.element, empty("No matrix of this parameter was kept"));
    void [state, info, stage];
  }

  draw() {}
}
