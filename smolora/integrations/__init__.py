"""Instruments of smolora inside of other loops."""
