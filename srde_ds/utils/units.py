"""Units of memory and traffic."""

GIB = 2**30
"""A gibibyte, for memory and files"""
GB = 1e9
"""A gigabyte, for traffic"""
FP32, FP64, INT32, INT64 = 4, 8, 4, 8
"""Bytes of a value"""
