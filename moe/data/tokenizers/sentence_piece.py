"""Reads SentencePiece models with the package `sentencepiece`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.config.objectives import TASK_TOKENS
from moe.data.tokenizers.errors import damage_error, ordinary_error


class SentencePieceVocabulary:
    """Reads a SentencePiece model. Its control pieces are the special tokens.

    A wanted piece that the model's author has declared (a user-defined one, which the model finds
    in text) is made a control piece, which it does not find.
    """

    def __init__(self, path: str, content: bytes, fingerprint: str, wanted: Sequence[str]):
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # which makes its classes when it is loaded
        self.name = f"sentencepiece {fingerprint}"
        model = messages.ModelProto()
        self._processor = SentencePieceProcessor()
        try:
            model.ParseFromString(content)
            types = messages.ModelProto.SentencePiece.Type
            # Tasks' tokens are special in all commands, also where only text is read or prepared.
            special = {*wanted, *TASK_TOKENS}
            for piece in model.pieces:
                if piece.piece in special and piece.type == types.USER_DEFINED:
                    piece.type = types.CONTROL
                elif piece.piece in wanted and piece.type != types.CONTROL:
                    raise ordinary_error(path, piece.piece)
            self._processor.LoadFromSerializedProto(model.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise damage_error(path, "SentencePiece model", error) from None
        self.size = len(model.pieces)
        self.text_ids = np.arange(self.size)
        self.special_ids = {
            piece.piece: id for id, piece in enumerate(model.pieces) if piece.type == types.CONTROL
        }
        ends = [self._processor.eos_id(), self._processor.bos_id()]
        self.boundary_id = next((id for id in ends if id >= 0), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self._processor.EncodeAsIds(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self._processor.DecodeIds(ids)
