"""What goes over sockets: channels, keys, statuses, tensors in pieces, domain types to protobuf and back."""
