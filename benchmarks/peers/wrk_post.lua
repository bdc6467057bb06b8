-- Posts one file again and again; each connection waits DATAMIX_PAUSE_MS after an answer, so that
-- all of them together keep to a rate. wrk counts answers of other statuses than 2xx itself.
local file = assert(io.open(os.getenv("DATAMIX_BODY"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["content-type"] = "application/vnd.apache.arrow.stream"
wrk.headers["x-request-disconnect-disabled"] = "?1"

local pause_ms = tonumber(os.getenv("DATAMIX_PAUSE_MS"))

function delay()
  return pause_ms
end
