"""``/v1/models``."""

from litestar import Router

from app.routes.handlers import reading
from app.schemas import ModelView
from app.service import Service
from domain.ids import ModelId
from domain.models import ModelInfo


@reading("/models")
async def list_models(service: Service) -> list[ModelInfo]:
    """Models that clients may name."""
    return service.models.known()


@reading("/models/{model_id:path}")
async def get_model(model_id: str, service: Service) -> ModelView:
    """A model, loaded if it was not: its config and what it claims about its bits."""
    key = ModelId(model_id.lstrip("/"))
    config, numerics = await service.models.describe(key)
    info = service.models.info(key)
    return ModelView(
        model_id=info.model_id,
        description=info.description,
        model_type=info.model_type,
        loaded=info.loaded,
        embedded=info.embedded,
        config=config,
        numerics=numerics,
    )


router = Router("/v1", tags=["models"], route_handlers=[list_models, get_model])
