"""The style sheet of a report: light and dark, as the reader's system has it."""

# Told apart by every common kind of color vision, and at least 3:1 on their grounds.
_LIGHT = (
    "#1769b5",
    "#c14a12",
    "#12805a",
    "#8a45b0",
    "#967000",
    "#bf2f70",
    "#1f8494",
    "#5c5c5c",
)
_DARK = (
    "#6fb5f2",
    "#ff9c68",
    "#5ccf9f",
    "#cda2f0",
    "#e3c05a",
    "#f590bd",
    "#6ed3de",
    "#c0c0c0",
)


def _colors(colors: tuple[str, ...]) -> str:
    return "".join(f"--run{index}:{color};" for index, color in enumerate(colors))


_CURVES = "".join(
    f"path.run{i}{{stroke:var(--run{i})}}circle.run{i}{{fill:var(--run{i})}}"
    for i in range(len(_LIGHT))
)

STYLE = f"""
:root{{--ground:#fff;--raised:#f6f7f9;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;
{_colors(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#14171b;--raised:#1d2126;
--ink:#e8eaed;--soft:#a3acb7;--line:#3a414a;{_colors(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
header{{position:sticky;top:0;z-index:1;padding:.7rem 1.5rem .6rem;
background:var(--raised);border-bottom:1px solid var(--line)}}
main{{max-width:100rem;margin:0 auto;padding:0 1.5rem 3rem}}
h1{{font-size:1.15rem;margin:0}}
h2{{font-size:1.2rem;margin:2.2rem 0 .8rem;scroll-margin-top:9rem}}
h3{{font:600 .9rem/1.3 ui-monospace,Menlo,"DejaVu Sans Mono",monospace;margin:0;
overflow-wrap:anywhere}}
section{{scroll-margin-top:7rem}}
nav{{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}}
a{{color:var(--run0)}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.4rem;padding:0;
margin:.25rem 0;max-height:6rem;overflow:auto;overflow-wrap:anywhere}}
svg.key{{width:26px;height:12px;margin-right:.45rem;vertical-align:middle}}
.plots{{display:grid;gap:1rem;grid-auto-flow:dense;
grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr))}}
figure{{margin:0;padding:.8rem .9rem;background:var(--raised);
border:1px solid var(--line);border-radius:8px}}
figure svg,figure img{{display:block;width:100%;height:auto}}
figure.pixels img{{image-rendering:pixelated}}
@media (min-width:60rem){{figure.wider{{grid-column:span 2}}}}
figcaption{{color:var(--soft);font-size:.87rem}}
text{{fill:var(--soft);font-size:12.5px}}
text.label{{fill:var(--ink)}}
path{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
path.grid,path.tick,path.axis{{stroke-width:1}}
path.grid{{stroke:var(--line)}}
path.axis,path.tick{{stroke:var(--soft)}}
path.faint{{stroke-width:1.3;opacity:.75}}
{_CURVES}
table{{border-collapse:collapse;font-size:.87rem;margin-top:1rem}}
th,td{{padding:.3rem .8rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}}
tbody th{{font:500 .83rem/1.6 ui-monospace,Menlo,"DejaVu Sans Mono",monospace}}
td{{font-variant-numeric:tabular-nums}}
.wide{{overflow-x:auto}}
details{{margin:.8rem 0}}
summary{{cursor:pointer;color:var(--soft)}}
.warning{{border-left:4px solid var(--run1);padding-left:.8rem}}
@media print{{header{{position:static}}figure{{break-inside:avoid}}}}
"""
