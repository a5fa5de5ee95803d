"""The `openai` package against a running server."""

import asyncio
import base64
import struct

import openai
from harness import check, close, cosine, main, norm

TEXTS = ["A pine tree is pruned in spring.", "Someone cuts the branches of a conifer.", "Interest rates rose today."]


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


def embed(url, **options):
    return client(url).embeddings.create(model="any", **options)


@check
def embeddings_are_unit_vectors_in_the_order_of_the_inputs(url):
    answer = embed(url, input=TEXTS, encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert all(abs(norm(item.embedding) - 1) < 1e-4 for item in answer.data)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 15
    alone = embed(url, input=TEXTS[1], encoding_format="float")
    assert alone.data[0].embedding == answer.data[1].embedding, "a result depends on its batch"


@check
def meaning_shows(url):
    rows = [item.embedding for item in embed(url, input=TEXTS).data]
    assert cosine(rows[0], rows[1]) > cosine(rows[0], rows[2]) + 0.2


@check
def base64_holds_the_same_numbers(url):
    floats = embed(url, input=TEXTS[0], encoding_format="float").data[0].embedding
    text = embed(url, input=TEXTS[0], encoding_format="base64").data[0].embedding
    if isinstance(text, str):  # the package decodes it only where it chose the format itself
        raw = base64.b64decode(text)
        text = list(struct.unpack(f"<{len(raw) // 4}f", raw))
    assert close(text, floats, 1e-6)
    assert close(embed(url, input=TEXTS[0]).data[0].embedding, floats, 1e-6)


@check
def dimensions_shorten_and_normalise(url):
    full = embed(url, input=TEXTS[0]).data[0].embedding
    short = embed(url, input=TEXTS[0], dimensions=64).data[0].embedding
    assert len(short) == 64 and abs(norm(short) - 1) < 1e-4
    assert close(short, [value / norm(full[:64]) for value in full[:64]])


@check
def token_ids_are_inputs(url):
    one = embed(url, input=[101, 7592, 102]).data
    two = embed(url, input=[[101, 7592, 102], [101, 2088, 102]]).data
    assert len(one) == 1 and len(two) == 2
    assert one[0].embedding == two[0].embedding != two[1].embedding


@check
def models_are_listed(url):
    models = client(url).models.list().data
    assert len(models) == 1
    assert client(url).models.retrieve(models[0].id).id == models[0].id
    try:
        client(url).models.retrieve("no-such-model")
        raise AssertionError("an unknown model was found")
    except openai.NotFoundError as error:
        assert error.body["message"]


@check
def errors_become_the_packages_own(url):
    wrong = [dict(input=""), dict(input=[]), dict(input=TEXTS[0], dimensions=100_000), dict(input=[10**9])]
    for options in wrong:
        try:
            embed(url, **options)
            raise AssertionError(f"{options} was accepted")
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            assert error.body["message"] and error.body["type"], error.body
            assert error.request_id or error.response.headers["x-request-id"]


@check
def sixty_four_at_once_are_answered(url):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as at_once:
            texts = [f"{TEXTS[index % 3]} ({index})" for index in range(256)]
            gate = asyncio.Semaphore(64)

            async def one(text):
                async with gate:
                    answer = await at_once.embeddings.create(model="any", input=text, encoding_format="float")
                    return answer.data[0].embedding

            return texts, await asyncio.gather(*map(one, texts))

    texts, rows = asyncio.run(all_of_them())
    assert len(rows) == 256
    again = embed(url, input=texts[17], encoding_format="float").data[0].embedding
    assert again == rows[17], "a result depends on what runs beside it"


if __name__ == "__main__":
    main(__doc__)
