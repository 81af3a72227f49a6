using System.Text.Json.Nodes;
using Vmm.Core.Errors;

namespace Vmm.Tests.Faults;

/// <summary>
/// Starts a VM as an operator does who has looked at the other side. A VM that is held, because nobody but the operator knows whether the other side runs, must
/// refuse a plain <c>cont</c>.
/// </summary>
internal static class Operator
{
    /// <returns>What was wrong, or null.</returns>
    internal static async Task<string?> Start(FaultVm vm)
    {
        try
        {
            string? held = (await vm.Execute("query-status"))!["x-held"]?.ToString();
            if (held is not null && await IsAccepted(vm)) return $"{vm.Name} is held ('{held}'), and cont starts it without force";
            await vm.Execute("cont", held is null ? null : new JsonObject { ["x-force"] = true });
            return null;
        }
        catch (Exception e) when (e is VmmException or TimeoutException)
        {
            return $"{vm.Name} cannot be started: {e.Message}";
        }
    }

    private static async Task<bool> IsAccepted(FaultVm vm)
    {
        try
        {
            await vm.Execute("cont");
            return true;
        }
        catch (QmpErrorException)
        {
            return false;
        }
    }
}
