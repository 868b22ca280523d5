-- Admits rollouts: each once, within the byte budget, all records of the call or none for lack of room.
-- KEYS[3]  segments     stream  group `matcher`
-- KEYS[4]  seen:now     set     record ids of the current generation
-- KEYS[5]  seen:before  set     record ids of the generation before it
-- ARGV[2]  byte budget of the run
-- ARGV[3]  ids a generation of `seen` holds: at least so many of the latest are recognised
-- ARGV[4]  largest body, bytes
-- ARGV[5]  number of records, then for each, from ARGV[6]: line, body (msgpack)
--          line: record id \t policy version \t request id or nothing \t tokens \t task \t sample id
--                \t generated_at_ms \t purpose \t optimizer step; it goes into the log as it is
-- Reply: {"full", bytes in use}, or one text with a status a record, parted by " ":
--   ok         admitted
--   duplicate  admitted before
--   late       its request was closed without it
--   too_large  over the largest body
--   bad_id     line not as above, record or request id not 1 to 200 characters of A-Z a-z 0-9 . _ : ~ -, or a
--              record its open request did not ask for
local num, total = tonumber(ARGV[5]), 0
for i = 0, num - 1 do total = total + #ARGV[7 + 2 * i] end
local used = tonumber(redis.call('HGET', COUNTERS, 'bytes') or '0')
if used + total > tonumber(ARGV[2]) then return {'full', used} end

local LINE = '^([%w._:~-]+)\t(%d+)\t([%w._:~-]*)\t%d+\t[^\t\n]*\t[^\t\n]*\t%d+\t[^\t\n]*\t%-?%d+$'
local function read_line(line)
  local id, version, request = string.match(line, LINE)
  if id and #id <= 200 and #request <= 200 and #version < 16 then return id, version, request end
  return ''
end

-- one look at `seen` for all ids, and one at each request, instead of some for every record
local ids, versions, asked_by, seen = {}, {}, {}, {}
for i = 1, num do ids[i], versions[i], asked_by[i] = read_line(ARGV[4 + 2 * i]) end
for _, key in ipairs({KEYS[4], KEYS[5]}) do
  in_chunks(ids, function(chunk)
    for i, known in ipairs(redis.call('SMISMEMBER', key, unpack(chunk))) do
      if known == 1 then seen[chunk[i]] = true end
    end
  end)
end
local requests = {}
local function open_request(id)
  if requests[id] == nil then
    local records = redis.call('HGET', PREFIX .. 'request:' .. id, 'records')
    requests[id] = records and {records = ' ' .. records .. ' ', came = 0} or false
  end
  return requests[id]
end

local status, lines, entries, fresh, repeated, late, bytes, limit = {}, {}, {}, {}, 0, 0, 0, tonumber(ARGV[4])
for i = 1, num do
  local id, request, line, body = ids[i], asked_by[i], ARGV[4 + 2 * i], ARGV[5 + 2 * i]
  if id == '' then
    status[i] = 'bad_id'
  elseif #body > limit then
    status[i] = 'too_large'
  elseif seen[id] then
    status[i], repeated = 'duplicate', repeated + 1
  elseif request ~= '' and not open_request(request) then
    status[i], late = 'late', late + 1
  elseif request ~= '' and not string.find(open_request(request).records, ' ' .. id .. ' ', 1, true) then
    status[i] = 'bad_id'
  else
    if request ~= '' then requests[request].came = requests[request].came + 1 end
    seen[id] = true
    fresh[#fresh + 1] = id
    entries[#entries + 1] = redis.call('XADD', KEYS[3], '*', 'kind', 'segment', 'schema_version', '1',
      'record_id', id, 'policy_version', versions[i], 'body', body)
    status[i], bytes = 'ok', bytes + #body
    lines[#lines + 1] = line
  end
end

in_chunks(fresh, function(chunk) redis.call('SADD', KEYS[4], unpack(chunk)) end)
in_chunks(entries, function(chunk) redis.call('SADD', PREFIX .. 'admitted', unpack(chunk)) end)
for id, request in pairs(requests) do
  if request and request.came > 0 then
    local left = redis.call('HINCRBY', PREFIX .. 'request:' .. id, 'remaining', -request.came)
    if left <= 0 then close_request(id) end
    count('open_records', -request.came)
  end
end
if #lines > 0 then emit('pushed', 'records', table.concat(lines, '\n')) end
if redis.call('SCARD', KEYS[4]) >= tonumber(ARGV[3]) then redis.call('RENAME', KEYS[4], KEYS[5]) end
count('pushed', #lines)
count('duplicates', repeated)
count('late', late)
count('bytes', bytes)
return table.concat(status, ' ')
