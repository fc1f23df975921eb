/** Light on the picture: what was read stays bright, with a warm edge; the rest dims. Cells are the padded square's. */

const FINE = 14; // pixels of the soft map per cell
const SOFT = 0.36; // share of a cell over which the light of its neighbour fades
const SPILL = 0.5; // of a neighbour's light, at the edge
const VEIL = [9, 11, 20, 0.6]; // what was not read: colour and opacity
const WARM = [255, 178, 36]; // the light, readable on any photo beside the veil
const TINT = 0.1; // opacity of warm light over what was read
const ROUND = 0.12; // radius of a lit corner, share of a cell
const FAINT = 0.02; // a difference that nobody sees
const EASE = 110; // milliseconds in which the light moves most of its way
const still = matchMedia("(prefers-reduced-motion: reduce)");

/**
 * Where the picture lies in the square of its long side, as the server pads it.
 * @param {number} width @param {number} height
 */
function placeInSquare(width, height) {
  const side = Math.max(width, height);
  return { side, left: (side - width) / 2, top: (side - height) / 2 };
}

/**
 * How bright each cell is: the share of these layers that read it.
 * @param {number[][] | null} cells indices, one list per reading layer
 * @param {number[]} shown indices into `cells` of the layers that count
 * @param {number} grid cells per side @returns {Float32Array} [grid * grid], 0..1
 */
export function shareOf(cells, shown, grid) {
  const share = new Float32Array(grid * grid);
  for (const layer of shown) for (const cell of cells?.[layer] ?? []) share[cell] += 1 / shown.length;
  return share;
}

/** The brightest of several tokens, cell by cell. @param {Float32Array[]} shares @param {number} grid */
export function brightest(shares, grid) {
  const most = new Float32Array(grid * grid);
  for (const share of shares) share.forEach((value, cell) => (most[cell] = Math.max(most[cell], value)));
  return most;
}

/** One layer of many must be seen, too. @param {number} share 0..1 */
const brightness = (share) => Math.min(1, share) ** 0.6;

/**
 * Lays the light over a picture that is already drawn, or lies below.
 * @param {CanvasRenderingContext2D} pen
 * @param {{x: number, y: number, width: number, height: number}} box of the picture, in pixels of the canvas
 * @param {Float32Array} share of each cell, 0..1
 * @param {number} veil 0..1, how far what was not read is dimmed
 * @param {number} line width of the edge in pixels of the canvas
 */
export function drawLight(pen, box, share, veil, line) {
  if (veil <= 0) return;
  const grid = Math.sqrt(share.length);
  const { side, left, top } = placeInSquare(box.width, box.height);
  pen.save();
  pen.beginPath();
  pen.rect(box.x, box.y, box.width, box.height);
  pen.clip();
  pen.translate(box.x - left, box.y - top);
  pen.imageSmoothingEnabled = true;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(softMap(share, grid, veil), 0, 0, side, side);
  drawCorners(pen, grid, side / grid, veil, line);
  drawEdges(pen, share, grid, side / grid, veil, line);
  pen.restore();
}

/** Veil and tint of the whole square, small, to be drawn large. */
function softMap(share, grid, veil) {
  const size = grid * FINE;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(size, size);
  const values = share.map(brightness);
  const places = Array.from({ length: size }, (_, index) => {
    const at = (index + 0.5) / FINE;
    const cell = Math.floor(at);
    const inside = at - cell;
    const other = Math.min(grid - 1, Math.max(0, inside < 0.5 ? cell - 1 : cell + 1));
    const edge = Math.min(inside, 1 - inside);
    return { cell, other, spill: SPILL * Math.max(0, 1 - edge / SOFT) ** 1.6 };
  });
  for (let y = 0; y < size; y++) {
    const row = places[y];
    for (let x = 0; x < size; x++) {
      const column = places[x];
      const light = Math.max(
        values[row.cell * grid + column.cell],
        values[row.cell * grid + column.other] * column.spill,
        values[row.other * grid + column.cell] * row.spill,
        (values[row.other * grid + column.other] * column.spill * row.spill) / SPILL,
      );
      const dark = VEIL[3] * (1 - light) * veil;
      const warm = TINT * light * veil;
      const at = 4 * (y * size + x);
      for (let channel = 0; channel < 3; channel++) {
        pixels.data[at + channel] = (VEIL[channel] * dark + WARM[channel] * warm) / (dark + warm || 1);
      }
      pixels.data[at + 3] = 255 * (dark + warm);
    }
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

/** A warm line where a brighter cell meets a darker one, as strong as they differ; corners that stick out are round. */
function drawEdges(pen, share, grid, cell, veil, line) {
  const inside = (row, column) => Math.min(row, column) >= 0 && Math.max(row, column) < grid;
  const value = (row, column) => (inside(row, column) ? brightness(share[row * grid + column]) : 0);
  const round = ROUND * cell;
  pen.lineWidth = line;
  pen.lineCap = "round";
  pen.shadowBlur = 6 * line;
  for (let row = 0; row < grid; row++) {
    for (let column = 0; column < grid; column++) {
      const own = value(row, column);
      if (own < FAINT) continue;
      // Clockwise from the top: the four sides, each from the corner before it to the corner behind it.
      const around = [value(row - 1, column), value(row, column + 1), value(row + 1, column), value(row, column - 1)];
      const steps = around.map((other) => own - other);
      steps.forEach((step, side) => {
        if (step < FAINT) return;
        const [before, behind] = [steps[(side + 3) % 4] >= FAINT, steps[(side + 1) % 4] >= FAINT];
        pen.save();
        pen.translate((column + 0.5) * cell, (row + 0.5) * cell);
        pen.rotate((side * Math.PI) / 2);
        pen.strokeStyle = pen.shadowColor = `rgba(${WARM.join(", ")}, ${Math.min(1, step) * veil})`;
        pen.beginPath();
        pen.moveTo(-cell / 2 + (before ? round : 0), -cell / 2);
        pen.lineTo(cell / 2 - (behind ? round : 0), -cell / 2);
        if (behind) pen.arc(cell / 2 - round, -cell / 2 + round, round, -Math.PI / 2, 0);
        pen.stroke();
        pen.restore();
      });
    }
  }
}

/** Where cells meet, so that the veil shows what could have been read. */
function drawCorners(pen, grid, cell, veil, line) {
  pen.fillStyle = `rgba(255, 255, 255, ${0.2 * veil})`;
  for (let row = 1; row < grid; row++) {
    for (let column = 1; column < grid; column++) {
      pen.fillRect(column * cell - line / 2, row * cell - line / 2, line, line);
    }
  }
}

/** A canvas over the picture whose light moves from one token to the next. */
export class Light {
  /** @param {HTMLCanvasElement} canvas laid exactly over the picture */
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.share = this.target = new Float32Array(81);
    this.veil = this.targetVeil = 0;
    this.frame = 0;
    this.before = 0;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** @param {Float32Array | null} share of each cell; null: no light, the picture as it is */
  show(share) {
    this.targetVeil = share ? 1 : 0;
    if (share) this.target = share;
    if (this.share.length !== this.target.length) this.share = new Float32Array(this.target.length);
    if (still.matches) {
      this.share = this.target;
      this.veil = this.targetVeil;
      this.draw();
    } else if (!this.frame) {
      this.before = performance.now();
      this.frame = requestAnimationFrame((now) => this.step(now));
    }
  }

  step(now) {
    const part = 1 - Math.exp(-Math.max(1, now - this.before) / EASE);
    this.before = now;
    let left = Math.abs(this.targetVeil - this.veil);
    this.veil += (this.targetVeil - this.veil) * part;
    this.share = this.share.map((value, cell) => {
      left = Math.max(left, Math.abs(this.target[cell] - value));
      return value + (this.target[cell] - value) * part;
    });
    if (left < 0.01) {
      this.share = this.target;
      this.veil = this.targetVeil;
      this.frame = 0;
    } else {
      this.frame = requestAnimationFrame((next) => this.step(next));
    }
    this.draw();
  }

  draw() {
    const { canvas, pen } = this;
    const scale = devicePixelRatio;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    pen.clearRect(0, 0, width, height);
    drawLight(pen, { x: 0, y: 0, width, height }, this.share, this.veil, 1.75 * scale);
  }
}
