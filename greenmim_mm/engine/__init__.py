"""What drives training and evaluation where mmengine needs help."""
