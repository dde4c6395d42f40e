"""The study: methods x K x shots x seeds beside classical models, on the same test samples."""

from rellax.ctr.study.grid import Cell, cells, reproduce

__all__ = ["Cell", "cells", "reproduce"]
