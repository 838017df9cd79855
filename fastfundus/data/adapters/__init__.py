"""Adapters for public data sets: one declarative entry per set, and the code shared by all of them."""

from fastfundus.data.adapters.entry import Adapter, Column, Table
from fastfundus.data.adapters.read import detect_adapter, list_with_adapter
from fastfundus.data.adapters.table import ADAPTERS, adapter_named

__all__ = ["ADAPTERS", "Adapter", "Column", "Table", "adapter_named", "detect_adapter", "list_with_adapter"]
