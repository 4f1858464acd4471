"""Many devices and many processes.

mesh          the sizes of the mesh, and the kind of device that a program is for
sharding      how arrays lie on the mesh, how a batch and its sequences are split
processes     processes that run together: found, joined, ended together
"""
