"""Where encoded images come from: class folders, a list of files, tar shards; checked, readable in any order."""

from contextual_cnn.data.sources.exclude_list import read_exclude_list, write_exclude_list
from contextual_cnn.data.sources.layout import Layout, find_layout, open_source
from contextual_cnn.data.sources.source import ImageSource

__all__ = ["ImageSource", "Layout", "find_layout", "open_source", "read_exclude_list", "write_exclude_list"]
