"""A self-contained page in the house's style: light and dark, no script, nothing fetched."""

from __future__ import annotations

from html import escape


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML, `title` plain text."""
    return _PAGE.format(title=escape(title), style=_style(), body=body)


def _style() -> str:
    from .plots import THEME

    light = "".join(f"--{name}:{colours[0]};" for name, colours in THEME.items())
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in THEME.items())
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_CSS}"
    )


_CSS = """*{box-sizing:border-box}
body{margin:0 auto;padding:1.6rem 1.2rem 4rem;max-width:72rem;background:var(--paper);
 color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:1.7rem}
h2{margin:2.4rem 0 .7rem;font-size:1.15rem}
h3{margin:0 0 .6rem;font-size:1rem;font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.sub{margin:.1rem 0 1.2rem;color:var(--muted);overflow-wrap:anywhere}
.headline{margin:0;padding:.9rem 1.1rem;border-left:4px solid var(--s0);font-size:1.06rem;
 background:color-mix(in srgb,var(--s0) 8%,transparent)}
.note{color:var(--muted);font-size:.87rem;max-width:50rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;text-align:left}
th,td{padding:.28rem .9rem .28rem 0;border-bottom:1px solid var(--grid);vertical-align:top;
 font-weight:400}
table.key{width:100%}
table.key td{white-space:nowrap;font-variant-numeric:tabular-nums}
table.fit{width:100%;font-size:.82rem}
table.fit th,table.fit td{padding-right:.6rem}
table.fit td{font-variant-numeric:tabular-nums}
table.fit th[scope=row]{min-width:9rem}
thead th{padding-top:1rem;font-weight:600;border-bottom-color:var(--muted)}
details th{color:var(--muted);white-space:nowrap}
details td{overflow-wrap:anywhere}
.grid{display:grid;gap:1.1rem;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr))}
.grid.wide{grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr))}
figure{margin:0;min-width:0;max-width:40rem}
figure svg{display:block;width:100%;height:auto}
.prompt{margin:0 0 1.8rem}
.answers{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(11.5rem,1fr);gap:.7rem;
 overflow-x:auto;padding-bottom:.5rem}
.answer{border:1px solid var(--grid);border-radius:6px;padding:.6rem .7rem;font-size:.88rem}
.w{margin:0 0 .4rem;font-weight:600;font-variant-numeric:tabular-nums}
.who{margin:.5rem 0 .1rem;color:var(--s0);font-weight:600}
.who span{color:var(--muted);font-weight:400;font-size:.82rem}
.base .who,.base blockquote{color:var(--muted)}
blockquote{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:42rem){table.key{font-size:.78rem}
 table.key td{white-space:normal}
 table.key th,table.key td{padding-right:.5rem}}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:600}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
