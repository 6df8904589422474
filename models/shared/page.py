"""What the demos' reports share: the style of a page, embedded pictures, JSON files, rounding."""

import base64
import json

from vidkern._files import replacing

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #f6f8fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; }
p { max-width: 75ch; margin: 8px 0; } .muted { color: #59636e; font-size: 14px; }
.verdict { background: #fff; border-left: 5px solid #dc6d28; padding: 14px 20px; margin: 20px 0; font-size: 18px; }
.cards { display: flex; gap: 16px; flex-wrap: wrap; margin: 20px 0; }
.card { background: #fff; border: 1px solid #d1d9e0; border-radius: 8px; padding: 12px 20px; flex: 1; min-width: 150px; }
.card b { display: block; font-size: 26px; } .card span { color: #59636e; font-size: 14px; }
table { border-collapse: collapse; background: #fff; margin: 12px 0; font-size: 15px; }
td, th { border: 1px solid #d1d9e0; padding: 5px 12px; text-align: right; } th { background: #f0f3f6; font-weight: 600; }
td:first-child, th:first-child { text-align: left; } tr.us td { background: #fff3e8; font-weight: 600; }
td.note { text-align: left; color: #59636e; }
img, video, svg { max-width: 100%; background: #fff; border: 1px solid #d1d9e0; border-radius: 6px; }
pre { background: #fff; border: 1px solid #d1d9e0; border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 13px; white-space: pre-wrap; }
.side { display: flex; gap: 32px; flex-wrap: wrap; align-items: flex-start; }
"""


def data_uri(path, kind):
    """A file as an address that a page can hold in itself; kind: its media type."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def rounded(value, digits=5):
    """Floats to significant digits, in nested lists and dicts."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, (list, tuple)) else value


def write_json(path, value):
    """Write a JSON file; it is whole or absent."""
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
