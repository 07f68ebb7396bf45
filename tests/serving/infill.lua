-- Asks /infill what llama.vim asks, shows the answer at the cursor as virtual text, and prints the screen.
-- FIELDS: the request of llama.vim, whose texts are set here. Start Neovim with the cursor in its place.
local fields = vim.fn.json_decode(vim.env.FIELDS)
local row, column = unpack(vim.api.nvim_win_get_cursor(0))
local lines = vim.api.nvim_buf_get_lines(0, 0, -1, false)
local line = lines[row]
local before, after = vim.list_slice(lines, 1, row - 1), vim.list_slice(lines, row + 1)
fields.input_prefix = table.concat(before, "\n") .. "\n"
fields.prompt = line:sub(1, column)
fields.input_suffix = line:sub(column + 1) .. "\n" .. table.concat(after, "\n") .. "\n"
fields.n_indent = #line:match("^ *")

local command = { "curl", "--silent", "--no-buffer", "--request", "POST", "--url", vim.env.ENDPOINT, "--header",
  "Content-Type: application/json", "--data", "@-" }
local answer = vim.fn.json_decode(vim.fn.system(command, vim.fn.json_encode(fields)))
local ghost = vim.split(answer.content, "\n")
local below = {}
for i = 2, #ghost do
  below[#below + 1] = { { ghost[i], "Comment" } }
end
local space = vim.api.nvim_create_namespace("infill")
vim.api.nvim_buf_set_extmark(0, space, row - 1, column, {
  virt_text = { { ghost[1] .. line:sub(column + 1), "Comment" } },
  virt_text_pos = "overlay",
  virt_lines = below,
})

vim.cmd("redraw!")
for screen_row = 1, vim.o.lines - 2 do
  local seen = {}
  for screen_column = 1, vim.o.columns do
    seen[screen_column] = vim.fn.screenstring(screen_row, screen_column)
  end
  io.write((table.concat(seen):gsub("%s+$", "")), "\n")
end
vim.cmd("qall!")
