# Gradients and optimiser states are cut among the processes (DeepSpeed's ZeRO, stage 2).
runner_type = 'FlexibleRunner'

strategy = dict(
    type='DeepSpeedStrategy',
    zero_optimization=dict(stage=2, overlap_comm=True),
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'],
)
