"""Scheduler cases, from random programs and from models of known families, for the tests of the scheduler itself."""
