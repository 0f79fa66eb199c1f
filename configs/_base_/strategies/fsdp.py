# Parameters, gradients and optimiser states are cut among the processes (PyTorch's FSDP).
runner_type = 'FlexibleRunner'

strategy = dict(
    type='greenmim_mm.engine.strategies.FSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        auto_wrap_policy='greenmim_mm.engine.strategies.wrap_swin_blocks',
        # Weight decay goes by the parameters' own names.
        use_orig_params=True,
    ),
    # Checkpoints are whole and written by one process: they load everywhere.
    state_dict_cfg='full',
)
