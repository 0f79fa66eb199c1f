"""What ``greenmim pretrain`` does, from the choice of settings to the exported weights.

``plan`` chooses, ``recipe`` makes the config of it, ``folder`` keeps the run's files, ``running``
goes the whole way and ``processes`` starts or joins several processes.
"""
