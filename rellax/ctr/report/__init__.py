"""What runs came to: the HTML page of `rellax report`, and the demo's Markdown."""

from rellax.ctr.report.markdown import Variant, remarks, table, write
from rellax.ctr.report.page import report

__all__ = ["Variant", "remarks", "report", "table", "write"]
