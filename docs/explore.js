"use strict";
/* The numbers of explore.html, and the drawing of the page. The numbers are those of hjepa/nn/frequencies.py and
 * hjepa/nn/rope.py, in float64; tests/test_explore.py holds the two together. Row first everywhere; a grid is
 * [rows, columns] in patches; queries and keys are all ones, so that a score is a mean of cosines.
 * Not covered: mixed frequencies, normalised coordinates, content. */

const STRATEGIES = ["extrapolate", "interpolate", "ntk", "ntk_by_parts"];
const PARTS = [0.25, 1.0]; // turns over the training grid below which a pair is interpolated, above which it is not
const IDLE = 0.1; // radians over the whole grid

/** Speeds of the dim / 4 pairs of one direction, in radians per patch: theta^(-i / n). */
function speeds(dim, theta) {
  const n = dim / 4;
  return Array.from({ length: n }, (_, i) => Math.pow(theta, -i / n));
}

/** One direction on another grid: the speeds under a strategy, and the offsets that pin the picture's edge. */
function rescaled(base, strategy, side, trained) {
  const s = side / trained, n = base.length;
  const scaled = base.map((w, i) => {
    if (strategy === "interpolate") return w / s;
    if (strategy === "ntk") return w * Math.pow(s, -i / Math.max(n - 1, 1));
    if (strategy === "ntk_by_parts") {
      const turns = (trained * w) / (2 * Math.PI);
      const keep = Math.min(Math.max((turns - PARTS[0]) / (PARTS[1] - PARTS[0]), 0), 1);
      return w * (keep + (1 - keep) / s);
    }
    return w;
  });
  return { speeds: scaled, offsets: scaled.map((w, i) => (w - base[i]) / 2) };
}

/** Length given to each turned pair: 1, or YaRN's 1 + 0.1 ln s on a larger grid under ntk_by_parts. */
function magnitude(strategy, grid, trained) {
  if (strategy !== "ntk_by_parts") return 1;
  return 1 + 0.05 * Math.log(Math.max((grid[0] * grid[1]) / (trained * trained), 1));
}

/** Angles of all dim / 2 pairs at a place [row, column]: row pairs first, then column pairs. */
function angles(place, settings) {
  const { dim, theta, strategy, grid, trained } = settings, base = speeds(dim, theta);
  return [0, 1].flatMap((axis) => {
    const now = rescaled(base, strategy, grid[axis], trained);
    return now.speeds.map((w, i) => place[axis] * w + now.offsets[i]);
  });
}

/** Score of a query at `query` with a key at `key` (places in patches, fractions allowed). */
function score(query, key, settings) {
  const a = angles(query, settings), b = angles(key, settings);
  const sum = a.reduce((total, angle, i) => total + Math.cos(angle - b[i]), 0);
  return (sum / a.length) * magnitude(settings.strategy, settings.grid, settings.trained) ** 2;
}

/** Scores of one query with the keys of all patches: an array of rows. */
function scoreMap(query, settings) {
  const { dim, theta, strategy, grid, trained } = settings, base = speeds(dim, theta);
  const gain = magnitude(strategy, grid, trained) ** 2;
  const profile = [0, 1].map((axis) => {
    const w = rescaled(base, strategy, grid[axis], trained).speeds;
    return Array.from({ length: grid[axis] }, (_, p) =>
      w.reduce((sum, speed) => sum + Math.cos((p - query[axis]) * speed), 0) / (2 * base.length));
  });
  return profile[0].map((row) => profile[1].map((column) => gain * (row + column)));
}

/** The place on a grid of `to` patches a side that lies where `place` lies on a grid of `from`. */
const samePlace = (place, from, to) => place.map((p, axis) => ((p + 0.5) * to[axis]) / from[axis] - 0.5);

/** Angle from the first to the last patch of a side, pair by pair. */
const turnsOver = (speedsOfPairs, side) => speedsOfPairs.map((w) => w * (side - 1));

/** Mean difference of the score map from that of training at the same places of the picture. */
function differenceFromTraining(query, settings) {
  const square = [settings.trained, settings.trained];
  const home = { ...settings, strategy: "extrapolate", grid: square };
  const map = scoreMap(query, settings), from = samePlace(query, settings.grid, square);
  let sum = 0;
  map.forEach((line, r) => line.forEach((value, c) => {
    sum += Math.abs(value - score(from, samePlace([r, c], settings.grid, square), home));
  }));
  return sum / (settings.grid[0] * settings.grid[1]);
}

if (typeof module !== "undefined") {
  module.exports = {
    STRATEGIES, angles, differenceFromTraining, magnitude, rescaled, samePlace, score, scoreMap, speeds, turnsOver,
  };
}

// ---- the page

const PATCH = 16, DIM = 64, LOW = -0.25, HIGH = 1;
const ROW = "#882255", COLUMN = "#4D6600", GREY = "#999999", INK = "#222222";
const CIVIDIS = [[0, 34, 78], [33, 59, 110], [76, 85, 108], [108, 110, 114], [141, 137, 120], [176, 166, 112],
  [216, 198, 92], [254, 232, 56]];

function colour(value) {
  const t = Math.min(Math.max((value - LOW) / (HIGH - LOW), 0), 1) * (CIVIDIS.length - 1);
  const i = Math.min(Math.floor(t), CIVIDIS.length - 2);
  return `rgb(${CIVIDIS[i].map((x, k) => Math.round(x + (t - i) * (CIVIDIS[i + 1][k] - x))).join(",")})`;
}

/** A canvas of a height in CSS pixels, sharp on any screen: [context, width, height]. */
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.clearRect(0, 0, width, height);
  context.font = "13px sans-serif";
  return [context, width, height];
}

function drawMap(canvas, map, query) {
  const rows = map.length, columns = map[0].length;
  const cell = Math.min(canvas.clientWidth / columns, 340 / rows);
  const [context] = prepare(canvas, Math.ceil(cell * rows) + 2);
  map.forEach((line, r) => line.forEach((value, c) => {
    context.fillStyle = colour(value);
    context.fillRect(c * cell, r * cell, cell + 0.5, cell + 0.5);
  }));
  for (const [shade, width] of [["#000000", 4], ["#ffffff", 1.8]]) {  // seen on light and on dark cells
    context.strokeStyle = shade;
    context.lineWidth = width;
    context.strokeRect(query[1] * cell + 1, query[0] * cell + 1, cell - 2, cell - 2);
  }
  return cell;
}

function drawBar(canvas) {
  const [context, width] = prepare(canvas, 34);
  for (let x = 0; x < width; x += 1) {
    context.fillStyle = colour(LOW + ((HIGH - LOW) * x) / width);
    context.fillRect(x, 0, 1.5, 14);
  }
  context.fillStyle = INK;
  for (const [value, align] of [[LOW, "left"], [0.25, "center"], [0.5, "center"], [HIGH, "right"]]) {
    context.textAlign = align;
    context.fillText(value === HIGH ? "1 or more" : value === LOW ? `${LOW} or less` : String(value), ((value - LOW) / (HIGH - LOW)) * width, 30);
  }
}

function drawAngles(canvas, all) {
  const half = all.length / 2, shown = [0, 2, 4, 6, 8, 10, 12, 14].filter((i) => i < half);
  const [context, width] = prepare(canvas, 190), step = (width - 56) / shown.length, radius = Math.min(step * 0.4, 26);
  [[ROW, "rows", 0], [COLUMN, "columns", half]].forEach(([shade, name, start], line) => {
    const y = 36 + 92 * line;
    context.fillStyle = shade;
    context.textAlign = "left";
    context.fillText(name, 0, y + 4);
    shown.forEach((pair, place) => {
      const x = 56 + step * (place + 0.5), angle = all[start + pair];
      context.strokeStyle = "#cccccc";
      context.lineWidth = 1;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.stroke();
      context.strokeStyle = shade;
      context.lineWidth = 2.5;
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(x + radius * Math.cos(angle), y - radius * Math.sin(angle));
      context.stroke();
      context.fillStyle = INK;
      context.textAlign = "center";
      context.fillText(angle.toFixed(1), x, y + radius + 16);
    });
  });
}

function drawSpectrum(canvas, lines) {
  const [context, width, height] = prepare(canvas, 220), left = 58, bottom = 26, low = -4, high = 2;
  const y = (value) => 8 + ((high - Math.log10(Math.max(value, 1e-4))) / (high - low)) * (height - bottom - 8);
  const pairs = lines[0].values.length, x = (i) => left + 12 + (i * (width - left - 24)) / (pairs - 1);
  context.fillStyle = "#eeeeee";
  context.fillRect(left, y(IDLE), width - left, y(1e-4) - y(IDLE));
  context.fillStyle = INK;
  for (let power = low; power <= high; power += 2) {
    context.textAlign = "right";
    context.fillText(power < 0 ? `1/${10 ** -power}` : String(10 ** power), left - 5, y(10 ** power) + 4);
  }
  context.textAlign = "left";
  context.fillText("below 0.1 rad: hardly moves", left + 6, y(2e-4));
  context.textAlign = "center";
  for (let i = 0; i < pairs; i += 3) context.fillText(String(i), x(i), height - 6);
  lines.forEach(({ values, shade, dash }) => {
    context.strokeStyle = shade;
    context.lineWidth = 2;
    context.setLineDash(dash);
    context.beginPath();
    values.forEach((value, i) => (i ? context.lineTo(x(i), y(value)) : context.moveTo(x(i), y(value))));
    context.stroke();
  });
  context.setLineDash([]);
}

function start() {
  const get = (name) => document.getElementById(name), number = (name) => Number(get(name).value);
  let cell = 1;
  const clampQuery = (grid) => ["row", "column"].map((name, axis) => {
    get(name).max = grid[axis] - 1;
    return Math.min(number(name), grid[axis] - 1);
  });
  function update() {
    const trained = number("trained"), grid = [number("height") / PATCH, number("width") / PATCH];
    const theta = Math.round(10 ** number("theta") * 10) / 10, strategy = get("strategy").value;
    const settings = { dim: DIM, theta, strategy, grid, trained }, square = [trained, trained];
    const query = clampQuery(grid), from = samePlace(query, grid, square);
    const home = { ...settings, strategy: "extrapolate", grid: square };
    const texts = {
      theta: theta < 100 ? theta.toFixed(1) : theta.toFixed(0), trained: `${trained} × ${trained} patches`,
      height: `${number("height")} px, ${grid[0]} rows`, width: `${number("width")} px, ${grid[1]} columns`,
      row: query[0], column: query[1],
    };
    for (const [name, text] of Object.entries(texts)) get(`${name}-text`).textContent = text;
    drawMap(get("map-home"), scoreMap(from, home), from);
    cell = drawMap(get("map-now"), scoreMap(query, settings), query);
    drawBar(get("bar"));
    drawAngles(get("angles"), angles(query, settings));
    const base = speeds(DIM, theta);
    const now = [0, 1].map((axis) => turnsOver(rescaled(base, strategy, grid[axis], trained).speeds, grid[axis]));
    drawSpectrum(get("spectrum"), [
      { values: turnsOver(base, trained), shade: GREY, dash: [] },
      { values: now[0], shade: ROW, dash: [] }, { values: now[1], shade: COLUMN, dash: [7, 5] },
    ]);
    const off = differenceFromTraining(query, settings);
    get("finding").textContent = off < 0.0005
      ? "Every score is that of training at the same place of the picture."
      : `On average a score differs by ${off.toFixed(3)} from that of training at the same place of the picture.`;
    const idle = now[0].filter((turn) => turn < IDLE).length;
    get("idle").textContent = `${idle} of ${base.length} row pairs turn by less than 0.1 rad from the first row to the last.`;
  }
  get("map-now").addEventListener("click", (event) => {
    const box = event.target.getBoundingClientRect();
    get("row").value = Math.floor((event.clientY - box.top) / cell);
    get("column").value = Math.floor((event.clientX - box.left) / cell);
    update();
  });
  document.querySelectorAll("input, select").forEach((control) => control.addEventListener("input", update));
  window.addEventListener("resize", update);
  update();
}

if (typeof document !== "undefined") start();
