"""Request bodies for Litestar: JSON only, decoded strictly by :mod:`app.decoding`."""

from typing import Any, Generic, TypeVar

from litestar.dto import AbstractDTO
from litestar.exceptions import ClientException
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition
from msgspec import Struct

from app.decoding import decode

T = TypeVar("T", bound=Struct)


class UnsupportedMediaType(ClientException):
    """A body that is not JSON."""

    status_code = 415


class JsonBody(AbstractDTO[T], Generic[T]):
    """Decodes a handler's ``data`` and describes it by its own struct."""

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: structs describe themselves."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Reference | Schema:
        """The struct's own schema."""
        schema: Reference | Schema = schema_creator.for_field_definition(field_definition)
        return schema

    def decode_bytes(self, value: bytes) -> T:
        """Decode a body.

        Raises:
            UnsupportedMediaType: the request does not say it is JSON.
            InvalidInput: names every wrong field.
        """
        content_type = self.asgi_connection.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType("Send the body as application/json")
        body: T = decode(value, self.model_type)
        return body

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Any:
        """Not used: nothing is transferred field by field."""
        return iter(())

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        """Not used: nothing is transferred field by field."""
        return False
