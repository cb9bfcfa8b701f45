"""An artifact or a training run as one self-contained HTML page.

overview   what is shown, from a manifest, stored tensors and a run's log
charts     inline SVG
render     the page, from page.html.jinja and page.css, and the file
"""

from surgery.page.overview import Overview, look
from surgery.page.render import render, write_page

__all__ = ["Overview", "look", "render", "write_page"]
