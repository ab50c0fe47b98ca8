"""The layers: rotary positions, encoders, masks, predictor, losses. They know nothing of data or config."""
