"""The page that shows what happened and why: timeline, splits, experts, bytes, memory. It needs no network.

::

    from pyggml.viz import view_of_records, write_page

    write_page(Path("run.html"), view_of_records(recording.records, name="my run"))
    html = page_html(view_of_scheduler(sched))          # a run, or the plan of the latest graph
    html = page_html(view_of_graph(graph))              # nodes, shapes, sources
    html = page_html(used, full, title="used and full")   # two views: side by side
"""

from .objects import view_of_graph, view_of_scheduler
from .page import page_html, write_page
from .show import Page, show_page
from .view import View, view_of_records

__all__ = [
    "Page",
    "View",
    "page_html",
    "show_page",
    "view_of_graph",
    "view_of_records",
    "view_of_scheduler",
    "write_page",
]
