"""Factorpack and its peers on the same networks, data and machine.

Each peer runs in processes of its own (`protocol`), with packages of its own (`environments`); `runs` keeps what was
measured, point by point, `plots` and `page` draw it.
"""
