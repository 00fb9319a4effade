"""Readers of other libraries, used as their documentation recommends. Each is imported only if it is measured."""
