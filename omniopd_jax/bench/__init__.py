"""How fast the pieces are, next to the machine's bounds and to what a user would pick instead.

Every contestant (ours, a plain form of the same work, another library in its own virtual environment) is a process of
its own behind one small protocol, so that they take turns within one call and share no memory.
"""
