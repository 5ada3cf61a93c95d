"""Devices and processes.

In reading order:

    sharding     one table from logical axes to mesh axes: where every array lives
    distributed  several processes that run one program on one mesh
"""
