// Parameters in model order, folded into modules.

/**
 * @typedef {object} Row
 * @property {string} path a parameter's name, or a module's
 * @property {string} label
 * @property {number} depth
 * @property {number[]} leaves places of parameters
 * @property {boolean} folds whether it is a module
 * @property {boolean} open
 */
/** @typedef {{path: string, label: string, leaves: number[], children: Map<string, Branch>}} Branch */

/** @param {string[]} names @returns {Branch} */
export function tree(names) {
  /** @type {Branch} */
  const root = { path: "", label: "", leaves: [], children: new Map() };
  names.forEach((name, place) => {
    const parts = name.split(".");
    let at = root;
    at.leaves.push(place);
    parts.forEach((part, depth) => {
      const path = parts.slice(0, depth + 1).join(".");
      let child = at.children.get(part);
      if (!child) at.children.set(part, (child = { path, label: part, leaves: [], children: new Map() }));
      child.leaves.push(place);
      at = child;
    });
  });
  return root;
}

/**
 * Opens modules from the top while all rows fit; what was opened or closed by hand is.
 * @param {Branch} root
 * @param {number} most rows
 * @param {Map<string, boolean>} byHand
 * @returns {Row[]}
 */
export function rows(root, most, byHand) {
  const open = opened(root, most);
  for (const [path, is] of byHand) is ? open.add(path) : open.delete(path);
  /** @type {Row[]} */
  const found = [];
  /** @param {Branch} branch @param {number} depth @param {string} before */
  const walk = (branch, depth, before) => {
    const only = branch.children.size === 1 ? [...branch.children.values()][0] : null;
    const label = before + branch.label;
    if (only && only.leaves.length === branch.leaves.length) return walk(only, depth, `${label}.`);
    const folds = branch.children.size > 0;
    const isOpen = folds && open.has(branch.path);
    found.push({ path: branch.path, label, depth, leaves: branch.leaves, folds, open: isOpen });
    if (isOpen) for (const child of branch.children.values()) walk(child, depth + 1, "");
  };
  for (const child of root.children.values()) walk(child, 0, "");
  return found;
}

/** @param {Branch} root @param {number} most */
function opened(root, most) {
  /** @type {Set<string>} */
  const open = new Set();
  let level = [...root.children.values()];
  let count = level.length;
  while (level.length) {
    const next = level.flatMap((branch) => [...branch.children.values()]);
    const more = next.length - level.filter((branch) => branch.children.size).length;
    if (count + more > (count < 8 ? 6 * most : most)) break;
    for (const branch of level) if (branch.children.size) open.add(branch.path);
    count += more;
    level = next;
  }
  return open;
}
