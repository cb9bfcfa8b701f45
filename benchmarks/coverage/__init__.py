"""Coverage: which architectures of timm, torchvision and transformers are traced, joined and given back exactly."""
