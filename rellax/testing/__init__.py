"""Inputs and tolerances of the tests."""
