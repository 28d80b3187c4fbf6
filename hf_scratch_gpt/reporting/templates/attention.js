// Draws the attention map: a thumbnail for every head to pick from, and the picked head with its tokens.
(() => {
  const data = JSON.parse(document.getElementById("attention-data").textContent);
  const heads = document.getElementById("heads"), map = document.getElementById("map");
  const told = document.getElementById("told");
  const size = data.tokens.length, cell = 21, svgSpace = "http://www.w3.org/2000/svg";
  const shown = data.tokens.map((token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥"));
  const colour = (element) => getComputedStyle(element).getPropertyValue("--c1").trim();

  const thumbnail = (weights) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    context.fillStyle = colour(document.documentElement);
    weights.forEach((row, y) => row.forEach((weight, x) => {
      context.globalAlpha = Math.sqrt(Math.max(0, weight));
      context.fillRect(x, y, 1, 1);
    }));
    return canvas;
  };

  const add = (parent, name, attributes, text) => {
    const element = document.createElementNS(svgSpace, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  };

  const show = (layer, head) => {
    const longest = Math.max(...shown.map((token) => token.length));
    const margin = Math.round(longest * 6.8) + 12, side = margin + size * cell;
    const svg = document.createElementNS(svgSpace, "svg");
    svg.setAttribute("width", side + 4);
    svg.setAttribute("height", side + 4);
    shown.forEach((token, index) => {
      const middle = margin + index * cell + cell / 2 + 4;
      add(svg, "text", { x: margin - 7, y: middle, "text-anchor": "end" }, token);
      add(svg, "text", { transform: `translate(${middle},${margin - 7}) rotate(-90)` }, token);
    });
    data.weights[layer][head].forEach((row, y) => row.forEach((weight, x) => {
      if (x > y) return;
      const square = add(svg, "rect", {
        x: margin + x * cell, y: margin + y * cell, width: cell - 1, height: cell - 1, rx: 2,
        "fill-opacity": (0.05 + 0.95 * Math.sqrt(weight)).toFixed(3),
      });
      add(square, "title", {}, `“${data.tokens[y]}” attends to “${data.tokens[x]}”: ${weight.toFixed(3)}`);
    }));
    map.replaceChildren(svg);
    told.textContent = `Layer ${layer + 1}, head ${head + 1}`;
    heads.querySelectorAll("button").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.at === `${layer},${head}`));
    });
  };

  const label = (text, kind) => {
    const element = document.createElement("div");
    element.className = `name ${kind}`;
    element.textContent = text;
    heads.append(element);
  };

  heads.style.gridTemplateColumns = `auto repeat(${data.heads}, auto)`;
  label("", "");
  for (let head = 0; head < data.heads; head++) label(`head ${head + 1}`, "");
  data.weights.forEach((layer, layerIndex) => {
    label(`layer ${layerIndex + 1}`, "row");
    layer.forEach((weights, headIndex) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.at = `${layerIndex},${headIndex}`;
      button.setAttribute("aria-label", `layer ${layerIndex + 1}, head ${headIndex + 1}`);
      button.append(thumbnail(weights));
      button.addEventListener("click", () => show(layerIndex, headIndex));
      heads.append(button);
    });
  });
  show(data.layers - 1, 0);
})();
