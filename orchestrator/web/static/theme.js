// Light and dark: the system's choice, or the reader's, and its colours for canvases.

const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const repaint = new Set();
let known = new Map();

/** Be told when colours change. */
export function onTheme(act) {
  repaint.add(act);
  return () => repaint.delete(act);
}

function fresh() {
  known = new Map();
  for (const act of repaint) act();
}

/** A colour of the style sheet, such as `--card`. */
export function colour(name) {
  if (!known.has(name)) known.set(name, getComputedStyle(root).getPropertyValue(name).trim());
  return known.get(name);
}

/** Take the reader's choice, and go on taking it. */
export function start(select) {
  let chosen = "";
  try {
    chosen = localStorage.getItem("megaray-theme") ?? "";
  } catch {
    chosen = ""; // a browser that keeps nothing
  }
  const use = (name) => {
    if (name) root.dataset.theme = name;
    else delete root.dataset.theme;
    fresh();
  };
  select.value = chosen;
  use(select.value);
  select.addEventListener("change", () => {
    try {
      localStorage.setItem("megaray-theme", select.value);
    } catch {
      // it holds until the page is closed
    }
    use(select.value);
  });
  dark.addEventListener("change", fresh);
}

const SEQUENCES = {
  light: [
    [247, 249, 252],
    [198, 219, 239],
    [107, 174, 214],
    [33, 113, 181],
    [8, 48, 107],
  ],
  dark: [
    [30, 33, 37],
    [36, 62, 99],
    [45, 113, 171],
    [99, 178, 214],
    [226, 243, 250],
  ],
};
const AROUND = {
  light: [
    [5, 80, 140],
    [120, 176, 214],
    [246, 246, 246],
    [240, 160, 110],
    [165, 40, 10],
  ],
  dark: [
    [120, 190, 240],
    [40, 100, 150],
    [38, 41, 46],
    [175, 85, 40],
    [255, 165, 110],
  ],
};

/** 256 colours as `[r, g, b]`: `low` to `high`, or around a middle. */
export function ramp(kind) {
  const theme = root.dataset.theme || (dark.matches ? "dark" : "light");
  const stops = (kind === "around" ? AROUND : SEQUENCES)[theme];
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1),
      left = Math.min(stops.length - 2, Math.floor(at)),
      part = at - left;
    return stops[left].map((value, c) => Math.round(value + (stops[left + 1][c] - value) * part));
  });
}
