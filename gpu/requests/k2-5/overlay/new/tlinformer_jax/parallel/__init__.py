"""Many devices and many processes.

mesh       the mesh's sizes, and the kind of device that a program is compiled for
sharding   how arrays are sharded over the mesh, and how a batch and its sequences are split
processes  several processes of one run: how they find each other, start and end together
"""
