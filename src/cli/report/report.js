// Reads values out under the pointer. The curves need no script.
for (const figure of document.querySelectorAll("figure.chart")) {
  const plot = figure.querySelector(".plot"), curves = JSON.parse(figure.dataset.curves);
  const make = (name) => Object.assign(document.createElement("div"), { className: name, hidden: true });
  const cursor = make("cursor"), readout = make("readout");
  plot.append(cursor, readout);
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const hide = () => { cursor.hidden = readout.hidden = true; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * 1000;
    const drawn = curves.filter((c) => c[2].length > 0);
    if (x < 0 || x > 1000 || drawn.length === 0) return hide();
    readout.replaceChildren();
    let at = null;
    for (const [name, look, points] of drawn) {
      const point = nearest(points, x);
      at ??= point;
      const line = document.createElement("div"), key = document.createElement("span");
      key.className = "key " + look;
      key.textContent = name + " ";
      const value = document.createElement("b");
      value.textContent = point[3];
      line.append(key, value, point[2] === at[2] ? "" : " (step " + point[2].toLocaleString("en") + ")");
      readout.append(line);
    }
    const head = document.createElement("div");
    head.textContent = "Step " + at[2].toLocaleString("en");
    readout.prepend(head);
    cursor.style.left = at[0] / 10 + "%";
    cursor.hidden = readout.hidden = false;
    const left = at[0] / 1000 < 0.5;
    readout.style.left = left ? "calc(" + at[0] / 10 + "% + 10px)" : "auto";
    readout.style.right = left ? "auto" : "calc(" + (100 - at[0] / 10) + "% + 10px)";
  });
}
