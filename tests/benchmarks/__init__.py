"""
The speed of dbmd beside what a tower would pick instead (``make bench``).

``systems`` starts what is compared and ``clients`` talks to it, each in its fastest honest way; ``workers`` are the
processes that do so at once, in the ``rounds`` of a job; ``records`` is what they store. ``stores``, ``disks``,
``reads``, ``scans``, ``upkeep`` and ``restart`` are the jobs. ``figures`` holds what a job found, ``goals`` what is
asked of it; ``report`` and ``plots`` show both, ``documents`` keeps them, and ``machine`` says where they were taken.
"""
