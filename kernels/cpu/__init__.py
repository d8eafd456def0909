"""CPU kernels in Numba: functions on addresses and integers.

From the ground up: `cache` (where compiled code lies), `emit` (vector code through llvmlite), `kernel` (what compiles
when), `words` (how a plan is laid out), the ops, `plan` (runs descriptors), `pool` (own threads). Importing this
package imports nothing; importing any of its modules imports Numba.
"""
